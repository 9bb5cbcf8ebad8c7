"""What ways to export a draft cost, what they are worth, and what each leads to."""
