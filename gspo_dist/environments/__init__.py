"""What answers a policy between its turns: environments and tools, in processes of their own."""
