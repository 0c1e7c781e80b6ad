"""`tiue generate`: what the command line asks for, as a pipeline and its pictures."""
