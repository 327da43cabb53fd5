"""Attackers beside the defender: processes that carry out Patcher's simulated attacks while it trains."""
