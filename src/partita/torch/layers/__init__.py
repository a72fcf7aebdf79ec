"""Layers split over the tensor ranks."""
