"""Behind `images.py`: where the bytes of an image lie, and the cheapest exact way from an image to pixels."""
