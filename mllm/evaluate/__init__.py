"""What a trained model is worth: questions asked one by one, scored, controlled, and shown to a person."""
