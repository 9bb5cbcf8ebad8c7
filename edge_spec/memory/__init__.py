"""Memory, counted before anything is loaded, and watched while it runs."""
