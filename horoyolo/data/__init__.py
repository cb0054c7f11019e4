"""Images and labels: found, checked, augmented and served in an order that no number of workers changes."""
