"""Weight sync: learner to engines, streamed in buckets, versioned and checked."""
