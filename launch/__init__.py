"""The `medfm` command: starting, planning and showing everything the other rooms do."""
