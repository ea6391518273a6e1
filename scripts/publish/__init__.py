"""What only the maintainers publish with: the configurations in hub_configs/, and the push of what they describe."""
