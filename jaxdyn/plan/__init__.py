"""What a run's programs would need and take on devices that need not be there."""
