"""The target rewrites the answers of a set of chats: through servers, or in this process."""
