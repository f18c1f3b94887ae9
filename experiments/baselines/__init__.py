"""Other methods, pre-trained in the same loop, on the same data and clock, for the tables."""
