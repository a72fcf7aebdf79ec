"""What a command line says, read and checked before any rank starts."""
