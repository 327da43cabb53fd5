"""The worst attacker within a stated budget: a search over the settings of an attack. No torch here."""
