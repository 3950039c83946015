// The original specialises by address space alone, and uses the Metal compiler's built-in traits.
namespace metal {
template <class T> using is_empty = std::is_empty<T>;
template <class... T> using void_t = void;
template <class T> struct is_static : std::is_empty<T> {};
template <class T> using pointer_element_t = std::remove_cv_t<std::remove_pointer_t<T>>;
}  // namespace metal
