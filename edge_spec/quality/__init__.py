"""How much of a model's quality survives in the way it is stored: one model compared with another."""
