"""What a run will take, before anything is spent: parameters, operations, memory, time. Without torch."""
