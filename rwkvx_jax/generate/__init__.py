"""Text generation: engine, sampling and command line."""
