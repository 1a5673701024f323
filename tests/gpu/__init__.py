"""What takes a device: `make test-gpu`."""
