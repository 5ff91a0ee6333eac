"""What Ray and Serve say of the fleet, and which replica gets a call."""
