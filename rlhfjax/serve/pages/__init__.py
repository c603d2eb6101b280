"""The chat page: one HTML file, its styles and its scripts, without a build step."""
