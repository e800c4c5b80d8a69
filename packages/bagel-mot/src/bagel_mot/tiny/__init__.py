"""A small BAGEL that paints coloured shapes: its world, its grader, its training."""
