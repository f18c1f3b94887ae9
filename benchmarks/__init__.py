"""Speed and accuracy beside baselines."""
