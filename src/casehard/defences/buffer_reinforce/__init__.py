"""Buffer-and-Reinforce: tune beside a temporary jailbreak, remove it, merge what refuses."""
