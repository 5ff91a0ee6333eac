"""What an operator may say: arguments, deployment options, building and checking a Serve config."""
