"""The seams of ``casehard.train.protocol`` on any ``transformers.Trainer``, and safe checkpoints."""
