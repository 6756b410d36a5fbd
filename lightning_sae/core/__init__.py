"""What an SAE is and learns: pure torch, without a Trainer."""
