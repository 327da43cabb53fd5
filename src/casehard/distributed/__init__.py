"""What needs several processes: collectives, ranks and their rows, and models sharded by FSDP2."""
