"""The training shell: the seams of ``defend.protocol`` on any ``transformers.Trainer``, and safe checkpoints."""
