"""The training shell: the seams of ``casehard.defend.protocol`` on any ``transformers.Trainer``, and safe checkpoints."""
