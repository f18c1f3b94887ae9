"""Speed and accuracy beside peers."""
