"""Other methods, which the tables compare: they are pre-trained in the same loop, on the same data and clock."""
