"""Behind `chat.py`: what a template prints around the turns, and where the assistant speaks."""
