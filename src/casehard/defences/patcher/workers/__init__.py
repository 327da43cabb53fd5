"""Attackers in processes of their own, which carry out Patcher's simulated attacks while it trains."""
