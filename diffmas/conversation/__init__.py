"""Talking to a system: what is asked, what is answered, and what the answer was made from."""
