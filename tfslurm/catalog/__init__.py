"""The shared database: what exists, in which status, and who made it so."""
