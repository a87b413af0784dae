"""Where it runs: settings, backends, memory, processes, profiler ranges."""
