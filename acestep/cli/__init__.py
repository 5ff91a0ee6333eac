"""The subcommands of `acestep`, a module each. Other packages add theirs through the entry-point group `acestep.commands`."""
