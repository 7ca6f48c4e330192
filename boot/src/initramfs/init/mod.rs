//! The guest side: what the crossvisor binary does when it is `/init`.
