"""Projects of their own, run by ``test_plugin_projects.py`` and not from here."""

collect_ignore_glob = ["*/*"]
