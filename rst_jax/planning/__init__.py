"""What a configuration will cost, from compiled programs and published rates."""
