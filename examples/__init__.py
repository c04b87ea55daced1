"""Services that use Sagabox."""
