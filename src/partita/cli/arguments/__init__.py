"""The arguments of commands, parsed and checked before any rank starts."""
