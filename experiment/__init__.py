"""What one run is: its flags, its directory, and the objects that the flags stand for."""
