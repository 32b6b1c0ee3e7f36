"""What a configuration, or a setting that other frameworks ship, really optimises."""
