"""What a run will cost: operations, time and memory, counted before it starts."""
