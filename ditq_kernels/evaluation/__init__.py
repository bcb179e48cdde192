"""What quantization does to the pictures: same-seed differences, and distances between distributions of samples."""
