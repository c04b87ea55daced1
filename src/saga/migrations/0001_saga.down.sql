drop schema saga cascade;
