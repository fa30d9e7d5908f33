"""What every room needs: gradients, files, clocks, threads, streams of randomness."""
