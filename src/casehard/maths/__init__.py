"""Pure mathematics: torch and the standard library only."""
