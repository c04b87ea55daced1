"""What operators run beside the loops: migrations, status, and later retention and repair."""
