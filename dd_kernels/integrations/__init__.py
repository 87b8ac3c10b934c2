"""Other projects' interfaces over the ops; each module needs the project that it is named after, or nothing."""
